from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


def grid_of(images, columns, captions=None):
    return to_pil_image(make_grid(images, nrow=columns))
