"""What a tuned model costs and computes, in numbers and figures."""
