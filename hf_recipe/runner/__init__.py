"""The five stages in order, with a gate after each."""
