"""Do representations collapse across depth? Ranks and token similarity at every depth."""

from __future__ import annotations

import streamlit as st

from app.views.desk import desk
from app.views.grid import show_figures, show_question

st.title("Collapse across depth")
st.markdown("Do tokens become equal, and does the representation use few directions?")
found = desk()
show_question(found, "collapse")
show_figures(found, "collapse")
