"""What a user meets: capture of masks and models, the public API and the command line."""
