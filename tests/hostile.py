"""What somebody who means harm would put into a folder that a user names."""

import os


class Plant:
    """A pickle that makes a folder when its code is executed."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)
