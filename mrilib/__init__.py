"""Two-stage MRI reconstruction with a frozen language-model backbone."""
