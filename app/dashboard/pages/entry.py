"""Where does every page begin? The navigation, the choice of runs, then the page itself."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from depthscope.app.dashboard.components.page_style import apply_style
from depthscope.app.dashboard.state.chosen_runs import lay_out

# Not in the folder above: Streamlit takes a folder pages/ next to the main script for its older kind of navigation.
HERE = Path(__file__).resolve().parent

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
