"""Everything about tokens and text: languages, tokenizer, prompt, and reading what the model wrote."""
