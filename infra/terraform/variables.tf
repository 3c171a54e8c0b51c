variable "project" {
  description = "Google Cloud project; its name begins the buckets' names."
  type        = string
}

variable "region" {
  description = "Of buckets and images; the one whose TPUs or GPUs you have quota for: what leaves it is paid for."
  type        = string
}

variable "zone" {
  description = "Of the cluster and its nodes."
  type        = string
}

variable "authorized_networks" {
  description = "Who may talk to the Kubernetes API: name to CIDR."
  type        = map(string)
}

variable "cpu_nodes" {
  description = "Most spot nodes for CPU workers and for preparing corpora; 0: no such pool."
  type        = number
  default     = 4
}

variable "gpu_pools" {
  description = "Pools of GPU nodes, by name. Each is spot and grows from 0."
  type = map(object({
    machine_type = string # g2-standard-8, a3-highgpu-8g, ...
    accelerator  = string # nvidia-l4, nvidia-h100-80gb, ...
    per_node     = number
    most_nodes   = number
  }))
  default = {}
}

variable "tpu_pools" {
  description = "Pools of TPU slices, by name: each is one slice, spot, there or not there as a whole."
  type = map(object({
    machine_type = string # ct5lp-hightpu-4t, ct6e-standard-4t, ct4p-hightpu-4t, ct5p-hightpu-4t
    topology     = string # as cluster.topology of the recipe
    hosts        = number # chips of the topology / chips of the machine type
  }))
  default = {}
}

variable "keep_scratch_days" {
  description = "Runs under gs://PROJECT-tvq-runs/scratch are for trying things out: after so many days their files go. Longer than the longest pause of such a run."
  type        = number
  default     = 14
}

variable "keep_deleted_days" {
  description = "So long what was deleted can be had back, and is paid for: also each checkpoint that retention removes, so a run that keeps 2 and saves hourly stores 24 more a day of this."
  type        = number
  default     = 2
}
