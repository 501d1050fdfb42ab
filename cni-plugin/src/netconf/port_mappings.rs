//! `runtimeConfig.portMappings`: ports of the host that shall lead to the pod (CNI conventions, "Dynamic Plugin specific
//! fields").

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;

use husk_overlay::port_mapping::{PortMapping, TransportProtocol};
use husk_overlay::prefix::Family;
use serde_json::{Map, Value};

use super::{NetConf, conventional, invalid, unsupported};
use crate::error::Failure;

/// Key of the whole.
const KEY: &str = "runtimeConfig.portMappings";

/// Keys of an entry.
const HOST_PORT: &str = "hostPort";
const CONTAINER_PORT: &str = "containerPort";
const PROTOCOL: &str = "protocol";
const HOST_IP: &str = "hostIP";

impl NetConf {
    /// Mappings that are asked for, sorted; an entry that stands there twice counts once. Two others that clash are refused.
    pub(crate) fn port_mappings(&self) -> Result<Vec<PortMapping>, Failure> {
        let entries = match self.object("runtimeConfig")?.and_then(|it| it.get("portMappings")) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(entries)) => entries,
            Some(other) => return Err(invalid(KEY, &format!("{other} is not a list"))),
        };
        let mut mappings: Vec<PortMapping> = Vec::new();
        for (index, value) in entries.iter().enumerate() {
            let mapping = Entry::new(index, value)?.mapping()?;
            match mappings.iter().find(|other| mapping.clashes_with(other)) {
                None => mappings.push(mapping),
                Some(other) if *other == mapping => {}
                Some(other) => {
                    let problem = format!("{mapping} clashes with {other}: a packet could be for either");
                    return Err(invalid(&format!("{KEY}[{index}]"), &problem));
                }
            }
        }
        mappings.sort();
        Ok(mappings)
    }
}

/// Refuses mappings for addresses of a family that the pod has no address of.
pub(crate) fn require_families(mappings: &[PortMapping], families: &BTreeSet<Family>) -> Result<(), Failure> {
    let address = mappings.iter().filter_map(|mapping| mapping.host_ip).find(|it| !families.contains(&Family::of(*it)));
    address.map_or(Ok(()), |address| {
        let family = Family::of(address);
        let problem = format!("{address} cannot lead to the pod: pods on this node have no {family} addresses");
        Err(invalid(&format!("{KEY}: {HOST_IP}"), &problem))
    })
}

/// One entry, and what it is called in messages.
struct Entry {
    name: String,
    fields: Map<String, Value>,
}

impl Entry {
    fn new(index: usize, value: &Value) -> Result<Self, Failure> {
        let name = format!("{KEY}[{index}]");
        let fields = value.as_object().ok_or_else(|| invalid(&name, &format!("{value} is not an object")))?;
        let known = [HOST_PORT, CONTAINER_PORT, PROTOCOL, HOST_IP];
        let fields = conventional(fields, &known);
        if let Some((key, value)) = fields.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            return Err(unsupported(&format!("{name}.{key}"), value));
        }
        Ok(Self { name, fields })
    }

    fn mapping(&self) -> Result<PortMapping, Failure> {
        Ok(PortMapping {
            protocol: self.protocol()?,
            host_port: self.port(HOST_PORT)?,
            host_ip: self.host_ip()?,
            container_port: self.port(CONTAINER_PORT)?,
        })
    }

    fn field(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn invalid(&self, key: &str, problem: &str) -> Failure {
        invalid(&format!("{}.{key}", self.name), problem)
    }

    fn port(&self, key: &str) -> Result<NonZeroU16, Failure> {
        let value = self.field(key).ok_or_else(|| self.invalid(key, "it is missing"))?;
        let number = value.as_u64().and_then(|number| u16::try_from(number).ok());
        number
            .and_then(NonZeroU16::new)
            .ok_or_else(|| self.invalid(key, &format!("{value} is no port; ports are whole numbers from 1 to 65535")))
    }

    /// A text; one that is empty counts as missing, since runtimes written in Go send that for what nobody set.
    fn text(&self, key: &str) -> Result<Option<&str>, Failure> {
        match self.field(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(self.invalid(key, &format!("{other} is not a text"))),
        }
    }

    fn protocol(&self) -> Result<TransportProtocol, Failure> {
        let Some(name) = self.text(PROTOCOL)? else { return Ok(TransportProtocol::default()) };
        TransportProtocol::of_name(name).ok_or_else(|| {
            let known = TransportProtocol::ALL.map(TransportProtocol::name).join(", ");
            self.invalid(PROTOCOL, &format!("{name:?} is none of {known}"))
        })
    }

    fn host_ip(&self) -> Result<Option<IpAddr>, Failure> {
        let Some(text) = self.text(HOST_IP)? else { return Ok(None) };
        let address: IpAddr = text.parse().map_err(|_| {
            self.invalid(HOST_IP, &format!("{text:?} is not an address such as 192.0.2.1 or 2001:db8::1"))
        })?;
        if address == Ipv6Addr::LOCALHOST {
            let problem = "packets to ::1 cannot be routed to a pod; use 127.0.0.1 or another address of the host";
            return Err(self.invalid(HOST_IP, problem));
        }
        match unusable(address) {
            Some(problem) => Err(self.invalid(HOST_IP, &format!("{address} {problem}"))),
            None => Ok(Some(address)),
        }
    }
}

/// Why no packet to a pod can have that destination; none if one can.
fn unusable(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(it) if it.is_broadcast() => Some("is the broadcast address; use an address of the host"),
        _ if address.is_multicast() => Some("is a multicast address; use an address of the host"),
        IpAddr::V6(it) if it.to_ipv4_mapped().is_some() => {
            Some("is an IPv4 address in the form of IPv6, which is never on the wire; write it as IPv4 address")
        }
        IpAddr::V6(it) if it.is_unicast_link_local() => Some(
            "is a link-local address, which may stand for another host on each link; use another address of the host",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use serde_json::json;

    fn mappings(value: Value) -> Result<Vec<PortMapping>, Failure> {
        let conf = json!({"cniVersion": "1.0.0", "name": "husk", "runtimeConfig": {"portMappings": value}});
        let conf = NetConf::parse(conf.to_string().as_bytes())?;
        conf.refuse_unknown_fields()?;
        conf.port_mappings()
    }

    fn texts(value: Value) -> Vec<String> {
        mappings(value).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn entries_are_read_as_runtimes_write_them() {
        assert_eq!(texts(json!(null)), [""; 0]);
        assert_eq!(texts(json!([])), [""; 0]);
        let all = json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
            {"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1"},
            {"hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "2001:db8::1"},
            {"hostPort": 9, "containerPort": 65535, "protocol": "sctp", "hostIP": null},
            {"hostPort": 443, "containerPort": 8443},
            {"hostPort": 443, "containerPort": 8443, "protocol": ""},
            {"HostPort": 443, "ContainerPort": 8443, "Protocol": "TCP", "HostIP": ""},
        ]);
        assert_eq!(
            texts(all),
            [
                "tcp port 443 to 8443",
                "tcp port 8080 to 80",
                "udp 192.0.2.1:53 to 5353",
                "udp [2001:db8::1]:53 to 5353",
                "sctp port 9 to 65535",
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value() {
        let entry = |key: &str, value: Value| {
            let mut entry = json!({"hostPort": 80, "containerPort": 80});
            entry[key] = value;
            json!([{"hostPort": 1, "containerPort": 1}, entry])
        };
        for (value, code, parts) in [
            (entry("hostPort", json!(0)), Code::InvalidConfig, ["portMappings[1].hostPort", "0 is no port"]),
            (entry("hostPort", json!(65536)), Code::InvalidConfig, ["portMappings[1].hostPort", "65536"]),
            (entry("hostPort", json!(-1)), Code::InvalidConfig, ["portMappings[1].hostPort", "-1"]),
            (entry("hostPort", json!("80")), Code::InvalidConfig, ["portMappings[1].hostPort", "\"80\""]),
            (entry("hostPort", json!(80.5)), Code::InvalidConfig, ["portMappings[1].hostPort", "80.5"]),
            (entry("hostPort", json!(null)), Code::InvalidConfig, ["portMappings[1].hostPort", "missing"]),
            (entry("containerPort", json!(0)), Code::InvalidConfig, ["portMappings[1].containerPort", "0 is"]),
            (entry("containerPort", json!(70000)), Code::InvalidConfig, ["portMappings[1].containerPort", "70000"]),
            (entry("protocol", json!("icmp")), Code::InvalidConfig, ["portMappings[1].protocol", "\"icmp\""]),
            (entry("protocol", json!(6)), Code::InvalidConfig, ["portMappings[1].protocol", "6 is not"]),
            (entry("hostIP", json!("localhost")), Code::InvalidConfig, ["portMappings[1].hostIP", "\"localhost\""]),
            (entry("hostIP", json!("::1")), Code::InvalidConfig, ["portMappings[1].hostIP", "::1"]),
            (entry("hostIP", json!("::ffff:192.0.2.1")), Code::InvalidConfig, ["portMappings[1].hostIP", "as IPv4"]),
            (
                entry("hostIP", json!("224.0.0.1")),
                Code::InvalidConfig,
                ["portMappings[1].hostIP", "224.0.0.1 is a mul"],
            ),
            (entry("hostIP", json!("ff02::1")), Code::InvalidConfig, ["portMappings[1].hostIP", "ff02::1 is a mul"]),
            (entry("hostIP", json!("255.255.255.255")), Code::InvalidConfig, ["portMappings[1].hostIP", "broadcast"]),
            (entry("hostIP", json!("fe80::1")), Code::InvalidConfig, ["portMappings[1].hostIP", "link-local"]),
            (entry("hostIP", json!("fe80::1%eth0")), Code::InvalidConfig, ["portMappings[1].hostIP", "fe80::1%eth0"]),
            (entry("hostIP", json!(7)), Code::InvalidConfig, ["portMappings[1].hostIP", "7 is not"]),
            (entry("name", json!("web")), Code::UnsupportedField, ["portMappings[1].name", "\"web\""]),
            (json!(["80:80"]), Code::InvalidConfig, ["portMappings[0]", "\"80:80\""]),
            (json!({}), Code::InvalidConfig, ["runtimeConfig.portMappings", "{}"]),
        ] {
            let failure = mappings(value.clone()).unwrap_err();
            assert_eq!(failure.code, code, "{value}: {failure}");
            for part in parts {
                assert!(failure.message.contains(part), "{value}: {failure}");
            }
        }
    }

    #[test]
    fn two_entries_that_clash_are_refused() {
        let two = |one: Value, other: Value| {
            mappings(
                json!([{"hostPort": 80, "containerPort": 80, "hostIP": one}, {"hostPort": 80, "containerPort": 81, "hostIP": other}]),
            )
        };
        for (one, other) in [("", ""), ("", "192.0.2.1"), ("0.0.0.0", "192.0.2.1"), ("192.0.2.1", "192.0.2.1")] {
            let failure = two(json!(one), json!(other)).unwrap_err();
            assert_eq!(failure.code, Code::InvalidConfig);
            assert!(failure.message.contains("portMappings[1]") && failure.message.contains("clashes"), "{failure}");
        }
        assert!(two(json!("192.0.2.1"), json!("192.0.2.2")).is_ok());
        assert!(two(json!("0.0.0.0"), json!("::")).is_ok());
    }

    #[test]
    fn an_address_of_a_family_the_pod_lacks_is_refused() {
        let of = |address: &str| mappings(json!([{"hostPort": 80, "containerPort": 80, "hostIP": address}])).unwrap();
        let ipv4 = BTreeSet::from([Family::Ipv4]);
        for address in ["", "0.0.0.0", "192.0.2.1"] {
            assert!(require_families(&of(address), &ipv4).is_ok(), "{address}");
        }
        for address in ["::", "2001:db8::1"] {
            let failure = require_families(&of(address), &ipv4).unwrap_err();
            assert_eq!(failure.code, Code::InvalidConfig);
            assert!(failure.message.contains("hostIP") && failure.message.contains(address), "{failure}");
        }
    }
}
