"""The study of one claim: that models whose loss is flat in the weights have a small robust generalisation gap."""
