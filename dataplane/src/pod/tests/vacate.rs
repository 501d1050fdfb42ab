//! Deletion that is answered early.

use std::sync::mpsc;

use super::*;

struct Busy(mpsc::Sender<()>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send(()).unwrap();
    }
}

#[test]
fn both_ends_and_all_that_hung_on_them_are_gone_when_it_is_answered() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1", "fd42::1"]);
    let index = || host.0.run_in(|| host_interface_index(&spec.host_interface)).unwrap().unwrap();
    for _ in 0..5 {
        host.attach(&spec, &pod).unwrap();
        let (sender, finished) = mpsc::channel();
        let found = index().unwrap();
        assert!(host.0.run_in(|| vacate(&spec.host_interface, found, Busy(sender))).unwrap().unwrap());
        assert_eq!(index(), None);
        assert_eq!(host.interfaces(), []);
        assert!(!pod.run_in(|| interface_exists(&Netns::current().unwrap(), &name("eth0"))).unwrap().unwrap());
        assert_eq!(run(&host.0, "ip route show table all proto 72"), "");
        assert_eq!(run(&host.0, "ip neigh show nud permanent"), "");
        // The next attachment of the same name does not wait for the kernel to forget this one.
        host.attach(&spec, &pod).unwrap();
        assert_eq!(host.check(&spec, &pod), [""; 0]);
        host.detach(&spec);
        finished.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn an_interface_that_came_later_is_not_meant() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1"]);
    let index = || host.0.run_in(|| host_interface_index(&spec.host_interface)).unwrap().unwrap();
    host.attach(&spec, &pod).unwrap();
    let old = index().unwrap();
    host.detach(&spec);
    host.attach(&spec, &pod).unwrap();
    assert!(!host.0.run_in(|| vacate(&spec.host_interface, old, ())).unwrap().unwrap());
    assert!(!host.0.run_in(|| detach_index(&spec.host_interface, old)).unwrap().unwrap());
    assert_eq!(host.check(&spec, &pod), [""; 0]);
}

#[test]
fn an_interface_that_is_deleted_while_it_is_set_up_is_not_waited_for() {
    let spec = spec(1, &["10.42.0.1"]);
    let pod = Netns::new_unnamed().unwrap();
    let waited = pod.run_in(|| wait_until_ready(&mut Socket::open(Protocol::Route).unwrap(), &spec, 2)).unwrap();
    assert_eq!(waited.unwrap_err().errno(), Some(Errno::ENODEV));
}
