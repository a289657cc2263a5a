"""Products in low bits with what is too large for them kept in float."""
