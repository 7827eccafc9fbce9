"""How is a figure's specification built from an analysis?"""
