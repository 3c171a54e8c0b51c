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

variable "pools" {
  description = "What computes, by name: pools of spot nodes that grow from 0. CPU nodes are for CPU workers and for preparing corpora; a pool of TPUs is one slice, there or not there as a whole."
  type = map(object({
    machine_type = string           # n2-standard-16, a3-highgpu-8g, ct5lp-hightpu-4t, ct6e-standard-4t, ...
    most_nodes   = number           # of a slice: chips of the topology / chips of the machine type
    topology     = optional(string) # of a TPU slice, as cluster.topology of the recipe
    gpu = optional(object({
      type     = string # nvidia-l4, nvidia-h100-80gb, ...
      per_node = number
    }))
  }))
  default = {
    cpu = { machine_type = "n2-standard-16", most_nodes = 4 }
  }
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
