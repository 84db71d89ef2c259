"""Is this machine fit for training?"""
