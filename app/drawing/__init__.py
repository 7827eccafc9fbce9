"""How is a figure drawn? By plotly on a screen, by matplotlib on paper."""
