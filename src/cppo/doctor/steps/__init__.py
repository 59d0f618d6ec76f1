"""One file a stack: the shared batch through the stack's own code, in the layout that it has there."""
