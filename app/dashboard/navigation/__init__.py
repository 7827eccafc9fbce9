"""How does a visitor get from page to page? The script that Streamlit runs, and the style that all pages share."""
