"""The paper's questions, asked again: grids of short runs over several seeds, their tables and
plots."""
