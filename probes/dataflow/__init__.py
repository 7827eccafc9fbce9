"""Which value of a forward was computed from which, and how does one depend linearly on others?"""
