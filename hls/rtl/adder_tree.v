// Sum of 2**LEVELS signed numbers, a register after every second level of adders (two levels of carry chains are about
// what fits between registers at 300 MHz) and after the last.
//
// Latency: (LEVELS + 1) / 2 cycles. A new set of terms every cycle.
module adder_tree #(
    parameter LEVELS = 5,
    parameter WIDTH  = 8              // of a term; the sum has WIDTH + LEVELS bits and cannot overflow
) (
    input  wire                               clk,
    input  wire [(WIDTH << LEVELS) - 1:0]     terms,
    output wire signed [WIDTH + LEVELS - 1:0] sum
);
    genvar level, i;
    generate
        for (level = 0; level <= LEVELS; level = level + 1) begin : stage
            localparam W = WIDTH + level;
            localparam N = 1 << (LEVELS - level);
            wire [W * N - 1:0] node;
        end
        assign stage[0].node = terms;
        for (level = 1; level <= LEVELS; level = level + 1) begin : add
            localparam W = WIDTH + level;
            for (i = 0; i < (1 << (LEVELS - level)); i = i + 1) begin : pair
                wire signed [W - 2:0] a = stage[level - 1].node[2 * i * (W - 1) +: W - 1];
                wire signed [W - 2:0] b = stage[level - 1].node[(2 * i + 1) * (W - 1) +: W - 1];
                wire signed [W - 1:0] s = a + b;
                if (level % 2 == 0 || level == LEVELS) begin : registered
                    reg signed [W - 1:0] q;
                    always @(posedge clk) q <= s;
                    assign stage[level].node[i * W +: W] = q;
                end else begin : wired
                    assign stage[level].node[i * W +: W] = s;
                end
            end
        end
    endgenerate
    assign sum = stage[LEVELS].node;
endmodule
