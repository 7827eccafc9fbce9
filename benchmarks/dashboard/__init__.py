"""How long does a page of the dashboard take? Visits and interactions of every page, on runs of many sizes."""
