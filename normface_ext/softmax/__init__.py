"""The softmax head: margins, options, functions, layers."""
