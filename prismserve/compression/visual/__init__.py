"""Methods that reduce the tokens of one image after the encoder; one file each, the file name is the method name."""
