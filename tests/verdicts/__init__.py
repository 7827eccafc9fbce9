"""How often is a fault found, and how often is a healthy network blamed? A zoo that is drawn anew from any seed."""
