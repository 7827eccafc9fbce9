"""Where does every page begin? The navigation, the choice of runs, then the page itself."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.views.desk import lay_out

HERE = Path(__file__).parent

st.set_page_config(page_title="depthscope", page_icon="🔭", layout="wide")

PAGES = [
    st.Page(HERE / "overview.py", title="Overview", icon="🔭", default=True),
    st.Page(HERE / "collapse.py", title="Collapse", icon="📉", url_path="collapse"),
    st.Page(HERE / "similarity.py", title="Similarity", icon="🟪", url_path="similarity"),
    st.Page(HERE / "mixing.py", title="Mixing", icon="🔀", url_path="mixing"),
    st.Page(HERE / "gradients.py", title="Gradients", icon="🌊", url_path="gradients"),
]
page = st.navigation(PAGES)
lay_out()
page.run()
