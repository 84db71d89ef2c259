"""Does a layout compute what one process computes?"""
