"""Does it measure the same on a GPU, and what does it cost there?"""
