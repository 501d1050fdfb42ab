//! Every metric: its name, type, labels and meaning. Names follow Prometheus' rules: base units, `_total` for counters.

/// Type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until the daemon, or what counts in the kernel, begins anew.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
    /// Always 1; what it says is in its labels.
    Info,
}

/// A metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Full name, as it is asked for.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// Meaning, one sentence, for people.
    pub help: &'static str,
}

impl Metric {
    /// The name without what OpenMetrics adds to it by type.
    #[must_use]
    pub fn stem(&self) -> &'static str {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        self.name.strip_suffix(suffix).unwrap_or(self.name)
    }
}

macro_rules! catalogue {
    ($($constant:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric =
                Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };
        )*
        /// All metrics, in the order in which they are told.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

catalogue! {
    BUILD Info "husk_build_info" ["version"] "Version of the daemon";
    NODE Info "husk_node_info" ["node", "mode", "encrypted", "source", "blocks", "device"]
        "The node's name, its mode, whether that encrypts, where the cluster's state comes from (kubernetes or directory) and where address blocks do (pools or node-cidrs), and which WireGuard device serves (kernel, userspace or none)";
    READY Gauge "husk_ready" [] "1 if pods can be added to the node";
    ISSUES Gauge "husk_issues" ["kind", "severity"] "Issues there are, by kind and severity (warning, error or blocking); kinds without any are absent";

    PASSES Counter "husk_passes_total" ["result"] "Passes of the reconcile loop: clean, with failures, or given_up because the node could not be looked at";
    PASS_DURATION Histogram "husk_pass_duration_seconds" [] "How long passes of the reconcile loop took";
    LAST_PASS Gauge "husk_last_pass_timestamp_seconds" [] "When the last pass ended, as Unix time; there is one every five seconds at least";
    CHANGES Counter "husk_table_changes_total" ["table"] "Changes made to the kernel, by table";
    FAILURES Counter "husk_table_failures_total" ["table"] "Changes that the kernel refused and tables that could not be read, by table";
    TABLE_DURATION Histogram "husk_table_duration_seconds" ["table"] "How long a table took: reading it, comparing it with what is desired, and changing it; once for each pass that looked at it";
    POLICY_DURATION Histogram "husk_policy_programming_duration_seconds" [] "How long it took to bring a change of network policy into the kernel, from reading the table on";
    SOURCE_UP Gauge "husk_source_up" [] "1 if the cluster source answered when it was last asked";
    SOURCE_LAST Gauge "husk_source_last_success_timestamp_seconds" [] "When the cluster source last answered, as Unix time; absent before the first time";

    CNI_DURATION Histogram "husk_cni_duration_seconds" ["command", "result"] "How long ADD and DEL of the plugin took, from the start of its process on, by result (success or failure)";
    CNI_ERRORS Counter "husk_cni_errors_total" ["command", "code"] "ADD and DEL that failed, by the error code that the runtime was told";
    ADMISSION_DURATION Histogram "husk_cni_admission_duration_seconds" ["result"] "How long an ADD waited for the daemon: until its policy and host ports were in the kernel, or it was turned away";
    ENDPOINTS Gauge "husk_endpoints" [] "Pods of this node that have a lease";

    PEERS Gauge "husk_peers" ["state"] "Other nodes, by state (connected, idle, waiting, configured or refused), as in 'huskctl peers'";
    PEERS_HANDSHAKE Gauge "husk_peers_handshake_age_seconds" ["stat"] "Age of the last handshake (WireGuard) or received packet (IPsec) over the peers that had one: min, median, p99 and max";
    KEY_AGE Gauge "husk_key_age_seconds" [] "Age of the node's newest key; absent in modes without keys";
    KEY_INTERVAL Gauge "husk_key_rotation_interval_seconds" [] "Age at which a key is to be replaced at the latest; absent where it is replaced on demand only";
    KEYS_HELD Gauge "husk_keys_held" [] "Keys that the node holds: one, and two while a rotation is under way";
    KEY_ROTATING Gauge "husk_key_rotation_in_progress" [] "1 while a rotation of keys is under way";

    PATHS Gauge "husk_paths" ["family", "standing"] "Paths to peers, by what probing says of them (verified, limited, searching, unreachable or unknown)";
    PATHS_RTT Gauge "husk_paths_rtt_seconds" ["family", "stat"] "Smoothed round-trip time over all paths that have one: min, median, p99 and max";
    PATHS_LOSS Gauge "husk_paths_loss_ratio" ["family", "stat"] "Part of the recent probes that was lost, over all paths: min, median, p99 and max";
    PATHS_MTU Gauge "husk_paths_mtu_bytes" ["family", "stat"] "Largest packet of a pod that is known to pass, over all paths: min, median, p99 and max";
    UNDERLAY_MTU Gauge "husk_underlay_mtu_bytes" [] "MTU of the underlay interface";
    POD_MTU Gauge "husk_pod_mtu_bytes" [] "MTU of pod interfaces; absent while pods cannot be served";

    GUARD_PACKETS Counter "husk_guard_dropped_packets_total" ["reason"] "Packets dropped by the node's own rules: plaintext_out and plaintext_in are leaks that were stopped, spoofed are pods that used foreign addresses";
    GUARD_BYTES Counter "husk_guard_dropped_bytes_total" ["reason"] "Bytes of those packets";
    POLICY_PACKETS Counter "husk_policy_packets_total" ["verdict", "direction", "reason"] "Packets that network policy denied (by rule or default deny, from or to a pod that is not known, or of no connection), and packets of pods that it let pass";
    FLOWS Counter "husk_flows_recorded_total" ["kind"] "Flows that were recorded, by kind: denied and, while somebody asks for them, connection, for those that began or ended";
    FLOWS_LOST Counter "husk_flows_lost_total" ["kind"] "Flows that were not recorded, because the kernel had no room to tell of them or they were not understood, by kind (denied or connection)";
    XFRM_ERRORS Counter "husk_xfrm_errors_total" ["reason"] "Packets that IPsec did not let through, by the kernel's name of the reason (Documentation/networking/xfrm_proc.rst)";

    POOL_BLOCKS Gauge "husk_ipam_pool_blocks" ["pool"] "Blocks that an address pool has in all, unless it is disabled; of more than 100 pools the rest is (others)";
    POOL_USED Gauge "husk_ipam_pool_blocks_used" ["pool"] "Blocks of an address pool that belong to a node";
    BLOCKS Gauge "husk_ipam_blocks" ["family"] "Blocks of this node";
    ADDRESSES Gauge "husk_ipam_addresses" ["family"] "Addresses for pods in this node's blocks";
    LEASED Gauge "husk_ipam_addresses_leased" ["family"] "Addresses that pods of this node have";

    PEER_STATE Gauge "husk_peer_state" ["peer", "state"] "1 for the state that the peer is in (only with metrics.perPeer)";
    PEER_HANDSHAKE Gauge "husk_peer_handshake_age_seconds" ["peer"] "Age of the last handshake with the peer, or packet from it (only with metrics.perPeer)";
    PEER_RTT Gauge "husk_peer_rtt_seconds" ["peer", "family"] "Smoothed round-trip time to the peer (only with metrics.perPeer)";
    PEER_LOSS Gauge "husk_peer_loss_ratio" ["peer", "family"] "Part of the recent probes to the peer that was lost (only with metrics.perPeer)";
    PEER_MTU Gauge "husk_peer_mtu_bytes" ["peer", "family"] "Largest packet of a pod that is known to pass to the peer (only with metrics.perPeer)";

    PROCESS_CPU Counter "process_cpu_seconds_total" [] "Processor time that the daemon used, in user and kernel mode";
    PROCESS_RESIDENT Gauge "process_resident_memory_bytes" [] "Memory of the daemon that is resident";
    PROCESS_VIRTUAL Gauge "process_virtual_memory_bytes" [] "Address space of the daemon";
    PROCESS_FDS Gauge "process_open_fds" [] "Open file descriptors of the daemon";
    PROCESS_MAX_FDS Gauge "process_max_fds" [] "Most file descriptors that the daemon may have open";
    PROCESS_THREADS Gauge "process_threads" [] "Threads of the daemon";
    PROCESS_START Gauge "process_start_time_seconds" [] "When the daemon started, as Unix time";
}
