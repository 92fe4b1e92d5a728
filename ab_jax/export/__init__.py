"""Trained networks as they are deployed: files of integer codes, packed to their true width."""
