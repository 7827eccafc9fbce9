"""What does a measured step of a training cost, with metrics that are computed while it runs?"""
