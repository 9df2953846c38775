"""Speed and accuracy of the ops, side by side with other public implementations."""
