"""Every model that can be built tiny, captured and compared with plain hooks: what is right, unproven, refused, wrong?"""
