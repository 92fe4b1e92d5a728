"""One small network and its loss, in float and under each library: what a user has to write."""
