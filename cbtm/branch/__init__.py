"""Branch: the seed language model and its tokenizer, from which every expert starts."""
