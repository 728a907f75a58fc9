"""The data that have names, in a file that imports nothing: command lines and configurations know them at once."""

CIFAR_NAMES = ("cifar10", "cifar100")

TASKS = {
    "locate": "in which quadrant is the mark",
    "direction": "in which direction does the green mark lie from the red one",
    "leftmost": "what colour is the leftmost of three marks",
    "jigsaw": "is the smooth picture intact, or are its patches shuffled",
    "count": "how many marks are there (a control: needs no position)",
}
