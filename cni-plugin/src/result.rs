//! Results of ADD in the form of each version of the specification (section 5, "Success").

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_dataplane::pod::PodSpec;
use husk_overlay::mac::MacAddress;
use husk_overlay::marks::{POD_GATEWAY_V4, POD_GATEWAY_V6};
use husk_overlay::prefix::{Family, Prefix};
use serde_json::{Map, Value, json};

use crate::error::{Code, Failure};
use crate::netconf::Dns;
use crate::version::Version;

/// What we made.
#[derive(Debug)]
pub(crate) struct Made<'a> {
    /// The wired pod.
    pub(crate) spec: &'a PodSpec,
    /// `CNI_NETNS`
    pub(crate) sandbox: &'a str,
    /// Families whose default route in the pod leads to us.
    pub(crate) default_routes: BTreeSet<Family>,
}

/// The result of ADD: what plugins before us reported, extended by what we made.
pub(crate) fn render(
    version: Version,
    previous: Option<&Map<String, Value>>,
    made: &Made<'_>,
    dns: &Dns,
) -> Result<Value, Failure> {
    let Made { spec, sandbox, default_routes } = made;
    let mut result = previous.cloned().unwrap_or_default();
    result.insert("cniVersion".to_owned(), version.as_str().into());
    let interfaces = list(&mut result, "interfaces")?;
    interfaces.push(interface(version, spec.host_interface.as_str(), &spec.host_mac.to_string(), spec.mtu, None));
    let pod_index = interfaces.len();
    interfaces.push(interface(
        version,
        spec.pod_interface.as_str(),
        &spec.pod_mac.to_string(),
        spec.mtu,
        Some(sandbox),
    ));
    list(&mut result, "ips")?.extend(spec.addresses.iter().map(|address| ip(version, address, pod_index)));
    let routed = spec.addresses.iter().filter(|address| default_routes.contains(&Family::of(*address)));
    list(&mut result, "routes")?.extend(routed.map(default_route));
    let silent = result.get("dns").and_then(Value::as_object).is_none_or(Map::is_empty);
    if silent || *dns != Dns::default() {
        result.insert("dns".to_owned(), render_dns(dns));
    }
    Ok(Value::Object(result))
}

/// What a result says about one interface: its MTU and its Ethernet address, if told, and its addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reported {
    /// MTU in bytes.
    pub(crate) mtu: Option<u32>,
    /// Ethernet address, if told.
    pub(crate) mac: Option<MacAddress>,
    /// Addresses without their prefix lengths.
    pub(crate) addresses: Vec<IpAddr>,
}

/// Reads an interface in the sandbox from a result; none if the result does not have it.
pub(crate) fn find_interface(result: &Map<String, Value>, name: &str) -> Option<Reported> {
    // The host end has no sandbox, and another plugin may have named an interface on the host like ours in the pod.
    find(result, name, true)
}

/// Reads an interface on the host from a result; none if the result does not have it.
pub(crate) fn find_host_interface(result: &Map<String, Value>, name: &str) -> Option<Reported> {
    find(result, name, false)
}

fn find(result: &Map<String, Value>, name: &str, sandboxed: bool) -> Option<Reported> {
    let interfaces = result.get("interfaces")?.as_array()?;
    let index = interfaces.iter().position(|it| {
        it.get("name").and_then(Value::as_str) == Some(name)
            && it.get("sandbox").and_then(Value::as_str).is_some_and(|sandbox| !sandbox.is_empty()) == sandboxed
    })?;
    let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    let own = ips.filter(|ip| ip.get("interface").and_then(Value::as_u64) == u64::try_from(index).ok());
    let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next()?.parse().ok();
    let mtu = interfaces[index].get("mtu").and_then(Value::as_u64).and_then(|mtu| u32::try_from(mtu).ok());
    let mac = interfaces[index].get("mac").and_then(Value::as_str).and_then(|mac| mac.parse().ok());
    Some(Reported { mtu, mac, addresses: own.filter_map(address).collect() })
}

fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, Failure> {
    let place = result.entry(key).or_insert(Value::Null);
    if place.is_null() {
        *place = Value::Array(Vec::new());
    }
    place.as_array_mut().ok_or_else(|| {
        Failure::new(Code::InvalidConfig, format!("the network configuration's prevResult.{key} is not a list"))
    })
}

fn interface(version: Version, name: &str, mac: &str, mtu: u32, sandbox: Option<&str>) -> Value {
    let mut interface = json!({"name": name, "mac": mac});
    if version >= Version::V1_1_0 {
        interface["mtu"] = mtu.into();
    }
    if let Some(sandbox) = sandbox {
        interface["sandbox"] = sandbox.into();
    }
    interface
}

fn gateway(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => POD_GATEWAY_V4.into(),
        Family::Ipv6 => POD_GATEWAY_V6.into(),
    }
}

fn ip(version: Version, address: IpAddr, interface: usize) -> Value {
    let mut ip = json!({
        "address": Prefix::host(address).to_string(),
        "gateway": gateway(Family::of(address)).to_string(),
        "interface": interface,
    });
    if version < Version::V1_0_0 {
        ip["version"] = if address.is_ipv4() { "4".into() } else { "6".into() };
    }
    ip
}

fn default_route(address: IpAddr) -> Value {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    json!({"dst": format!("{any}/0"), "gw": gateway(Family::of(address)).to_string()})
}

fn render_dns(dns: &Dns) -> Value {
    let mut rendered = Map::new();
    for (key, list) in [("nameservers", &dns.nameservers), ("search", &dns.search), ("options", &dns.options)] {
        if !list.is_empty() {
            rendered.insert(key.to_owned(), list.clone().into());
        }
    }
    if !dns.domain.is_empty() {
        rendered.insert("domain".to_owned(), dns.domain.clone().into());
    }
    Value::Object(rendered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_overlay::name::InterfaceName;

    fn spec() -> PodSpec {
        PodSpec {
            host_interface: InterfaceName::new("husk00000000001").unwrap(),
            host_mac: MacAddress([2, 0, 0, 0, 0, 1]),
            alias: String::new(),
            pod_interface: InterfaceName::new("eth0").unwrap(),
            pod_mac: MacAddress([2, 0, 0, 0, 0, 2]),
            addresses: ["10.42.0.1".parse().unwrap(), "fd42::1".parse::<IpAddr>().unwrap()].into_iter().collect(),
            mtu: 1420,
            bandwidth: None,
            loopback: false,
        }
    }

    fn rendered(version: Version, previous: Option<Value>) -> Result<Value, Failure> {
        rendered_with(version, previous, Family::ALL.into_iter().collect())
    }

    fn rendered_with(
        version: Version,
        previous: Option<Value>,
        default_routes: BTreeSet<Family>,
    ) -> Result<Value, Failure> {
        let made = Made { spec: &spec(), sandbox: "/run/netns/x", default_routes };
        render(version, previous.as_ref().and_then(Value::as_object), &made, &Dns::default())
    }

    #[test]
    fn a_default_route_of_somebody_else_is_not_reported_as_ours() {
        let result = rendered_with(Version::V1_1_0, None, BTreeSet::from([Family::Ipv6])).unwrap();
        assert_eq!(result["routes"], json!([{"dst": "::/0", "gw": "fe80::1"}]));
    }

    #[test]
    fn version_1_1() {
        assert_eq!(
            rendered(Version::V1_1_0, None).unwrap(),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "husk00000000001", "mac": "02:00:00:00:00:01", "mtu": 1420},
                    {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1420, "sandbox": "/run/netns/x"},
                ],
                "ips": [
                    {"address": "10.42.0.1/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd42::1/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
                "dns": {},
            })
        );
    }

    #[test]
    fn older_versions_have_no_mtu_and_the_oldest_a_version_per_address() {
        let result = rendered(Version::V1_0_0, None).unwrap();
        assert!(result["interfaces"][0].get("mtu").is_none() && result["ips"][0].get("version").is_none());
        for version in [Version::V0_3_1, Version::V0_4_0] {
            let result = rendered(version, None).unwrap();
            assert_eq!((&result["ips"][0]["version"], &result["ips"][1]["version"]), (&json!("4"), &json!("6")));
            assert_eq!(result["cniVersion"], version.as_str());
        }
    }

    #[test]
    fn a_previous_result_is_extended() {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "other"}],
            "ips": [{"address": "192.0.2.1/24", "interface": 0}],
            "dns": {"nameservers": ["192.0.2.53"]},
            "vendor": true,
        });
        let result = rendered(Version::V1_0_0, Some(previous)).unwrap();
        assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
        assert_eq!(result["ips"][0]["address"], "192.0.2.1/24");
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["dns"]["nameservers"][0], "192.0.2.53");
        assert_eq!(result["vendor"], true);
        let reported = find_interface(result.as_object().unwrap(), "eth0").unwrap();
        assert_eq!(reported.addresses, spec().addresses.iter().collect::<Vec<_>>());
        assert_eq!(rendered(Version::V1_0_0, Some(json!({"ips": 7}))).unwrap_err().code, Code::InvalidConfig);
    }

    #[test]
    fn an_interface_is_found_in_its_sandbox_only() {
        let result = json!({"interfaces": [{"name": "eth0"}, {"name": "eth0", "sandbox": "/x", "mtu": 1400}]});
        let found = find_interface(result.as_object().unwrap(), "eth0").unwrap();
        assert_eq!(found, Reported { mtu: Some(1400), ..Reported::default() });
        assert_eq!(find_interface(result.as_object().unwrap(), "eth1"), None);
        for odd in [json!({"interfaces": 3}), json!({"interfaces": [3]}), json!({})] {
            assert_eq!(find_interface(odd.as_object().unwrap(), "eth0"), None);
        }
    }
}
