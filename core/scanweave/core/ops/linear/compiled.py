def takes(t):
    return False


def forward(*a):
    raise 0


def backward(*a):
    raise 0
