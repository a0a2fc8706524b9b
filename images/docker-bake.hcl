# Both images for every platform, as the workflow `images` publishes them:
#
#   set -a; eval "$(python3 -m components.images)"; docker buildx bake --file images/docker-bake.hcl
#
# The names come from components/images.py through the environment. `make images` builds for this machine alone, with
# any engine.
variable "CBTM_IMAGE_CPU" {}

variable "CBTM_IMAGE_GPU" {}

variable "VERSION" {}

variable "REVISION" {
  default = ""
}

# PyTorch's own index of CPU builds. Without it amd64 takes torch from the default index, whose build is that for CUDA.
variable "TORCH_CPU_INDEX" {
  default = ""
}

group "default" {
  targets = ["cpu", "gpu"]
}

target "image" {
  context    = "."
  dockerfile = "images/Containerfile"
  args = {
    VERSION  = VERSION
    REVISION = REVISION
  }
  attest = ["type=provenance,mode=max", "type=sbom"]
}

target "cpu" {
  inherits  = ["image"]
  args      = { DEVICE = "cpu", TORCH_INDEX = TORCH_CPU_INDEX }
  tags      = [CBTM_IMAGE_CPU]
  platforms = ["linux/amd64", "linux/arm64"]
}

target "gpu" {
  inherits  = ["image"]
  args      = { DEVICE = "cuda" }
  tags      = [CBTM_IMAGE_GPU]
  platforms = ["linux/amd64"]
}
