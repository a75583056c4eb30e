"""Methods that drop or merge visual tokens between decoder layers, one file each; the file name is the method's name."""
