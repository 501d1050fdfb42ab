//! Ports of the host that lead to a pod, as the kernel has them.

use std::collections::BTreeSet;

use husk_dataplane::nft::{self, NftChange};
use husk_dataplane::sysctl;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::ipc::NodeFile;
use husk_overlay::plan::{HostPorts, host_ports, is_of_tunnel, loopback_parameter};
use husk_overlay::port_mapping::PortMapping;
use husk_overlay::prefix::Family;

use crate::error::{Code, Failure};
use crate::netconf::port_mappings::require_families;

/// Refuses what cannot be on this node: addresses of a family that pods do not have, and ports of the node's tunnels.
pub(crate) fn refuse_impossible(mappings: &[PortMapping], node: &NodeFile) -> Result<(), Failure> {
    require_families(mappings, &node.families)?;
    let of_tunnel =
        |mapping: &&PortMapping| is_of_tunnel(mapping.protocol, mapping.host_port.get(), &node.tunnel_ports);
    mappings.iter().find(of_tunnel).map_or(Ok(()), |mapping| {
        let message = format!(
            "the host port {mapping} cannot be had: a tunnel of this node listens there; choose another host port, or \
             give Husk another port in its configuration"
        );
        Err(Failure::new(Code::PortClaimed, message))
    })
}

/// What is missing of an endpoint's port mappings, one sentence for each. The node file tells with what rules the daemon
/// makes them; without it only what is mapped is compared.
pub(crate) fn deviations(endpoint: &Endpoint, node: Option<&NodeFile>) -> Result<Vec<String>, Failure> {
    if endpoint.port_mappings.is_empty() {
        return Ok(Vec::new());
    }
    let rules = match node {
        Some(NodeFile { families, router, tunnel_ports, .. }) => {
            HostPorts { families: families.clone(), router: *router, tunnel_ports: tunnel_ports.clone() }
        }
        None => HostPorts {
            families: endpoint.addresses.iter().map(Family::of).collect(),
            router: endpoint.addresses,
            tunnel_ports: BTreeSet::new(),
        },
    };
    let (wanted, _) = host_ports(&rules, [endpoint]);
    let actual = nft::read()?;
    let missing = nft::diff(Some(&wanted), actual.as_ref()).into_iter().filter(|change| match change {
        NftChange::CreateTable { .. }
        | NftChange::ReplaceTable { .. }
        | NftChange::AddSet { .. }
        | NftChange::ReplaceSet { .. }
        | NftChange::AddElements { .. }
        | NftChange::AddMap { .. }
        | NftChange::ReplaceMap { .. }
        | NftChange::AddMappings { .. } => true,
        NftChange::AddChain { .. } | NftChange::ReplaceChain { .. } | NftChange::RebuildChain { .. } => node.is_some(),
        // The table has more in it than what this pod needs.
        NftChange::DeleteTable
        | NftChange::AddCounter { .. }
        | NftChange::DeleteElements { .. }
        | NftChange::DeleteMappings { .. }
        | NftChange::DeleteForeignElements { .. }
        | NftChange::DeleteChain { .. }
        | NftChange::DeleteObject { .. } => false,
    });
    let mut deviations: Vec<String> =
        missing.map(|change| format!("on the host, a port mapping lacks this: {change}")).collect();
    if let Some(parameter) = loopback_parameter(endpoint) {
        let value = sysctl::read([&parameter])?.remove(&parameter);
        if value.as_deref() != Some("1") {
            let value = value.unwrap_or_else(|| "missing".to_owned());
            deviations.push(format!("on the host, {parameter} is {value} instead of 1"));
        }
    }
    Ok(deviations)
}
