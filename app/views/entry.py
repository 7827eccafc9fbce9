"""Where does every page begin? The navigation, the choice of runs, then the page itself."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.views.desk import lay_out
from app.views.style import apply_style

HERE = Path(__file__).parent

st.set_page_config(page_title="depthscope", page_icon="🔭", layout="wide")

PAGES = [
    st.Page(HERE / "overview.py", title="Overview", default=True),
    st.Page(HERE / "collapse.py", title="Collapse", url_path="collapse"),
    st.Page(HERE / "similarity.py", title="Similarity", url_path="similarity"),
    st.Page(HERE / "mixing.py", title="Mixing", url_path="mixing"),
    st.Page(HERE / "gradients.py", title="Gradients", url_path="gradients"),
]
page = st.navigation({"depthscope": PAGES})
apply_style()
lay_out()
page.run()
