"""The compiler's passes, one file each; every pass is a pure function from one IR value to the next."""
