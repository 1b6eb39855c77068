"""How an answer is scored: pure functions, one file per kind of answer. Each names the public rule that it follows."""
