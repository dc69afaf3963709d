"""A study without Ray and without training: the real driver, store and artifacts, on groups that are threads.

Its processes start in milliseconds, by `fork`, so that a test can kill them by the hundred.
"""
