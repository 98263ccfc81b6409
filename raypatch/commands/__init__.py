"""The commands of the command line: options to one call each, and what the short ones do.

Heavy imports come inside of functions: ``--help`` loads neither torch nor ray.
"""
