"""How answers are read and compared: numbers in text, LaTeX, and the workers that bound the time this takes."""
