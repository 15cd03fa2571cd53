//! Workers that are Pods, of a cluster in this process: an API server that answers as Kubernetes' own does, with the controllers behind it
//! (`world`), over TLS (`server`), and a node that starts what Pods say (`kubelet`).

mod engine;
mod kubelet;
mod server;
mod training;
mod world;
