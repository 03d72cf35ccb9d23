"""The intermediate representations: expressions, masks, formats, graphs and kernels."""
