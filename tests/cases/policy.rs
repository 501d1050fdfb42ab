//! NetworkPolicy and ClusterNetworkPolicy with real sockets: over both families, on one host and between two, in modes vxlan and
//! wireguard. Every case asks everybody for everything, and says who may: all the others may not.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use husk_tests::policy::scene::{Question, Scene, Service, answers};
use husk_tests::{Cluster, Family, Mode, eventually};
use serde_json::json;

const IN_FORCE: Duration = Duration::from_secs(10);

fn is_tcp(service: Service, port: u16) -> bool {
    service == Service::Tcp(port)
}

#[test]
fn policies_hold_in_vxlan_mode() -> Result<()> {
    features(Mode::Vxlan)
}

#[test]
fn policies_hold_in_wireguard_mode() -> Result<()> {
    features(Mode::Wireguard)
}

fn features(mode: Mode) -> Result<()> {
    let scene = Scene::start(mode)?;
    let to_web = |question: &Question<'_>| question.to == "web";

    scene.policy("default", "deny", &json!({"podSelector": {"matchLabels": {"app": "web"}}}))?;
    scene.assert("a policy without rules isolates ingress", |it| !to_web(it))?;

    let web = json!({"matchLabels": {"app": "web"}});
    let clients =
        json!([{"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["client"]}]}}]);
    let ports = json!([{"port": 80}]);
    scene.policy("default", "clients", &json!({"podSelector": web, "ingress": [{"from": clients, "ports": ports}]}))?;
    scene
        .assert("pods of the policy's namespace at one TCP port, in union with a policy that allows nothing", |it| {
            !to_web(it) || it.from != "dev" && is_tcp(it.service, 80)
        })?;

    let dev = json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "dev"}},
        "podSelector": {"matchExpressions": [{"key": "stage", "operator": "Exists"}]}}]);
    let range = json!([{"protocol": "UDP", "port": 79, "endPort": 8080}]);
    scene.policy("default", "dev", &json!({"podSelector": web, "ingress": [{"from": dev, "ports": range}]}))?;
    scene.assert("pods of another namespace at a range of UDP ports, in union with the others", |it| {
        let service_of_dev = matches!(it.service, Service::Udp(_));
        !to_web(it) || if it.from == "dev" { service_of_dev } else { is_tcp(it.service, 80) }
    })?;

    scene.clear()?;
    let named = json!([{"port": "http"}]);
    scene.policy("default", "named", &json!({"podSelector": {}, "ingress": [{"ports": named}]}))?;
    let http = |pod: &str| if pod == "web" || pod == "dev" { 80 } else { 8080 };
    scene.assert("a named port is another number in every pod", |it| {
        it.to == "dev" || is_tcp(it.service, http(it.to))
    })?;

    scene.clear()?;
    let egress = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {}}], "ports": named}]});
    scene.policy("default", "egress", &egress)?;
    scene.assert("a named port of whoever is talked to, for egress alone", |it| {
        it.from == "dev" || it.to != "dev" && is_tcp(it.service, http(it.to))
    })?;

    scene.clear()?;
    scene.policy("default", "both", &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}))?;
    scene.assert("nothing goes in or out", |_| false)?;

    scene.clear()?;
    let web_addresses: Vec<String> = addresses(&scene, "web")?;
    let blocks = |except: &[String]| -> Vec<serde_json::Value> {
        let all = scene.cluster.cluster_cidrs().iter().map(|cidr| {
            let family = cidr.family();
            let except: Vec<String> =
                except.iter().filter(|it| it.contains(':') == (family == Family::Ipv6)).map(|it| host(it)).collect();
            json!({"ipBlock": {"cidr": cidr.to_string(), "except": except}})
        });
        all.collect()
    };
    let spec = json!({"podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"],
        "egress": [{"to": blocks(&web_addresses)}]});
    scene.policy("default", "blocks", &spec)?;
    scene.assert("addresses but for some", |it| it.from == "dev" || !to_web(it) || it.from == "web")?;

    scene.clear()?;
    cluster_policies(&scene)?;
    scene.clear()?;
    quarantine(&scene)?;
    services(&scene)?;
    hosts(&scene)?;
    scene.assert("without any policy, in the end", |_| true)?;
    scene.cluster.ensure_settled()
}

fn addresses(scene: &Scene, pod: &str) -> Result<Vec<String>> {
    Family::ALL.iter().map(|family| Ok(scene.pod(pod).address(*family)?.to_string())).collect()
}

/// The prefix of one address.
fn host(address: &str) -> String {
    format!("{address}/{}", if address.contains(':') { 128 } else { 32 })
}

fn cluster_policies(scene: &Scene) -> Result<()> {
    let everybody = json!([{"namespaces": {}}]);
    let web = json!({"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}});
    let tcp = |port: u16| json!([{"tcp": {"destinationPort": {"number": port}}}]);
    let of_dev = json!([{"namespaces": {"matchLabels": {"stage": "dev"}}}]);
    scene.cluster_policy(
        "admin",
        &json!({"tier": "Admin", "priority": 10, "subject": web, "ingress": [
            {"action": "Accept", "from": of_dev, "protocols": tcp(8080)},
            {"action": "Pass", "from": everybody, "protocols": tcp(80)},
            {"action": "Deny", "from": everybody},
        ]}),
    )?;
    scene.cluster_policy(
        "baseline",
        &json!({"tier": "Baseline", "priority": 0, "subject": web, "ingress": [
            {"action": "Deny", "from": of_dev},
        ]}),
    )?;
    let before = |it: &Question<'_>| {
        it.to != "web"
            || match it.from {
                "dev" => is_tcp(it.service, 8080),
                _ => is_tcp(it.service, 80),
            }
    };
    scene.assert("tiers: Admin accepts, passes on or denies; Baseline has the last word", before)?;
    scene.policy("default", "dev-at-80", &json!({
        "podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"stage": "dev"}}}]}]
    }))?;
    scene.assert("a NetworkPolicy has its say between the tiers", |it| {
        it.to != "web" || it.from == "dev" && (is_tcp(it.service, 8080) || is_tcp(it.service, 80))
    })
}

fn quarantine(scene: &Scene) -> Result<()> {
    let label = |value: &str| json!({"app": "client", "husk.dev/quarantine": value});
    scene.describe(scene.pod("near"), label("true"), &[])?;
    scene.assert("a pod in quarantine talks with nobody", |it| it.from != "near" && it.to != "near")?;
    let own = scene.cluster.host(1).address(Family::Ipv4)?;
    ensure!(!answers(scene.pod("near").netns(), Service::Ping, own)?, "nor with its own host");
    scene.describe(scene.pod("near"), label("false"), &[("http", 8080)])?;
    scene.assert("and is let out again", |_| true)?;
    ensure!(answers(scene.pod("near").netns(), Service::Ping, own)?);
    Ok(())
}

/// What kube-proxy does for a service: policy sees the addresses and ports of pods.
fn services(scene: &Scene) -> Result<()> {
    let service: IpAddr = "10.96.0.10".parse()?;
    for number in [1, 2] {
        let rules = format!(
            "table ip services {{\nchain nat {{\ntype nat hook prerouting priority dstnat\n\
             ip daddr {service} tcp dport 443 dnat to {}:80\n}}\n}}\n",
            scene.pod("web").address(Family::Ipv4)?
        );
        scene.cluster.host(number).program("nft").args(["-f", "-"]).stdin(&rules).check()?;
    }
    let at = SocketAddr::new(service, 443);
    let reaches = |pod: &str| {
        let limit = Duration::from_millis(400);
        husk_tests::probe::tcp::connect(scene.pod(pod).netns(), at, limit).is_ok()
    };
    for pod in ["near", "far", "dev"] {
        ensure!(reaches(pod), "{pod} reaches the service");
    }
    let far = json!([{"podSelector": {"matchLabels": {"role": "far"}}}]);
    let web = json!({"matchLabels": {"app": "web"}});
    scene.policy(
        "default",
        "far",
        &json!({"podSelector": web, "ingress": [{"from": far, "ports": [{"port": 80}]}]}),
    )?;
    scene.assert("one client at the port of the pod", |it| {
        it.to != "web" || it.from == "far" && is_tcp(it.service, 80)
    })?;
    ensure!(reaches("far"), "through the service, whose port is another");
    ensure!(
        !reaches("near") && !reaches("dev"),
        "and the others reach the pod through the service no more than without"
    );
    scene.clear()?;
    // Egress: what counts is where the connection goes in the end.
    let to_web = json!([{"to": [{"podSelector": web}], "ports": [{"port": 80}]}]);
    let near = json!({"matchLabels": {"app": "client"}});
    scene.policy("default", "near", &json!({"podSelector": near, "policyTypes": ["Egress"], "egress": to_web}))?;
    scene.assert("egress to the pod behind the service", |it| {
        it.from != "near" && it.from != "far" || it.to == "web" && is_tcp(it.service, 80)
    })?;
    ensure!(reaches("near") && reaches("far"), "the service's own address and port count for nothing");
    for number in [1, 2] {
        scene.cluster.host(number).program("nft").args(["delete table ip services"]).check()?;
    }
    scene.clear()
}

/// A host and its own pods always reach each other; other hosts are what policy says of their addresses.
fn hosts(scene: &Scene) -> Result<()> {
    scene.policy("default", "both", &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}))?;
    scene.assert("nothing goes in or out", |_| false)?;
    let (one, two) = (scene.cluster.host(1), scene.cluster.host(2));
    for family in Family::ALL {
        let web = scene.pod("web").address(family)?;
        ensure!(answers(one.netns(), Service::Tcp(80), web)?, "the host reaches its pod, {family}");
        ensure!(
            answers(scene.pod("web").netns(), Service::Ping, one.address(family)?)?,
            "and the pod its host, {family}"
        );
        ensure!(!answers(two.netns(), Service::Tcp(80), web)?, "another host does not, {family}");
        let outside = Cluster::outside_address(family);
        ensure!(
            !answers(scene.pod("web").netns(), Service::Ping, outside)?,
            "nor does the pod reach the outside, {family}"
        );
    }
    let peers: Vec<_> = Family::ALL
        .iter()
        .map(|family| Ok(json!({"ipBlock": {"cidr": host(&two.router(*family)?.to_string())}})))
        .collect::<Result<_>>()?;
    scene.policy("default", "host", &json!({"podSelector": {}, "ingress": [{"from": peers}]}))?;
    for family in Family::ALL {
        let web = scene.pod("web").address(family)?;
        eventually("the other host reaches the pod by its own address", IN_FORCE, || {
            answers(two.netns(), Service::Tcp(80), web)
        })?;
    }
    scene.clear()
}
