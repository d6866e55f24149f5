import org.apache.commons.cli.DefaultParser;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.ConfigManager.Arguments;

/** Constructs the hook as TorchServe's frontend does, twice, and prints what it did to the two properties. */
public class HookProbe {
    public static void main(String[] words) throws Exception {
        ConfigManager.init(new Arguments(new DefaultParser().parse(Arguments.getOptions(), words)));
        new org.tscores.CoresEndpoint();
        new org.tscores.CoresEndpoint();
        for (String name : new String[] {"python", "cpu_launcher_enable"}) {
            System.out.println(name + "=" + ConfigManager.getInstance().getProperty(name, ""));
        }
        System.exit(0);
    }
}
