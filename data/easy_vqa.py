NAME = "easy-vqa"
