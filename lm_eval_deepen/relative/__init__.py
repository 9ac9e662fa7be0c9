"""Relative representations: a member's pieces described by their similarity to the common anchors."""
