"""Data set to tiny data set: images to train on in place of a whole training split."""
